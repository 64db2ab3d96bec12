"""What people read: tables, pictures, the model card of an export."""
