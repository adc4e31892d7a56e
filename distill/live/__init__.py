"""Student responses drawn during training and scored by a teacher server."""
