"""What people run: a small training job that shows what distckpt does."""
