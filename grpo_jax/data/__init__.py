"""Sources of prompts, tasks and tokenizers."""
