"""What runs a model, behind one protocol: vllm, transformers, openai, scripted; and trl, which trains."""
