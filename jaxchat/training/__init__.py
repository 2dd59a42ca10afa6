"""What only training needs; nothing of it is imported by inference."""
