"""python -m pygguf_surgery: the command gguf-surgery."""

from .cli import program

if __name__ == "__main__":
    program()
