"""The vLLM room: packed KV cache per layer, request policies, refusals and status, inside a real vLLM 0.32 engine.

Nothing here is imported until vLLM asks for it: through the entry point (`entry`), the attention backend
(`cpu_backend`, `cuda_backend`), the worker extension (`worker`) or the logits processor (`policies`).
"""
