"""Self-Improving Pretraining on Megatron-Core and SGLang."""
