"""What a device runs: exact integers, .tflite files, C, and the targets that run them."""
