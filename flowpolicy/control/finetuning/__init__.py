"""Fine-tuning on a robot: a learner in a process of its own, beside the control loop."""
