"""Files: reading what strangers wrote, writing all or nothing, the Hugging Face Hub."""
