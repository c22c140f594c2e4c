"""The documentation: pages that are made from the code, and links of the site to files of the repository."""
