"""llama.cpp: runs a ``.gguf`` on any machine, through the low-level functions of llama-cpp-python."""
