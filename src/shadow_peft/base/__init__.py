"""What is known of foreign models: where their decoder layers are, how they are called, and the hooks placed on them."""
