"""``dcafy finetune`` as a folder: what was asked for, where it stands, what it has measured, and the model."""
