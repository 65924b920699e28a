"""GPU memory: NVML, which GPUs are meant, who holds them, and when they are given back."""
