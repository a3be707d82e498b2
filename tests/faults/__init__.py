"""The shared fault harness: mutators (F-mut), kills (F-kill), canaries (F-canary) and small plugins to break."""
