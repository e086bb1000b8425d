"""What the user asks for, as plain data: ``model`` declares it, ``grammar`` reads it, ``check`` judges it."""
