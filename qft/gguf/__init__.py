"""The GGUF file format: types, rounding, names, vocabulary, and the file itself as a stream.

Read by llama.cpp, Ollama and all that is built on them. `qft.export.gguf_format` puts it together.
"""
