"""What is compared and how: task losses and the objectives over them."""
