"""Distillation: a student that makes in one or two steps the chunks that a flow policy makes in many."""
