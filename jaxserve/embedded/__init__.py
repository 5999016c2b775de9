"""The small model that ships with the project, and everything that makes it."""
