"""ReinFlow: online fine-tuning of flow policies by PPO over the denoising chain."""
