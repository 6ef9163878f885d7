"""The bridge to Hugging Face: names, configurations, folders of safetensors."""
