"""From atomic files to rows, titles and prompts. Nothing here knows a model."""
