"""Sets that other projects of dataset distillation save: read, and recognised by what is in them."""
