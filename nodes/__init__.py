"""The Q&C nodes, one in each file; `comfyui` holds what they share."""
