"""What gpu_check.py does, a job a file."""
