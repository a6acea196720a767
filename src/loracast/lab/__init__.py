"""What makes and measures the product: generated data, training, evaluation. The product never imports it."""
