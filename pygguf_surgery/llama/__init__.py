"""llama.cpp in this process. Nothing else imports llama_cpp."""
