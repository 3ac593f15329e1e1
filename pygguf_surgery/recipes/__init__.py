"""Which type and which importance for which tensor."""
