"""Where datasets come from: what is known, how it is fetched, and a reader for each raw format."""
