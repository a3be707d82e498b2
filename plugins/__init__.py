"""One room per published system; each is a plugin of the host, found through its entry point."""
