"""One path to an answer: route, prompt, LoRA, generate, give or refuse; and the public Model."""
