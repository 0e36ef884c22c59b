"""What a repository for ``model.generate(custom_generate=...)`` holds; its files are copied, and imported there alone."""
