"""Off-policy fine-tuning: a critic of chunks, a replay, and what is learnt from both around the flow."""
