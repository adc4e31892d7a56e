"""The report as Markdown, terminal text, plots and a web page."""
