"""The inputs on which two networks are compared. A mistake is only found where an input brings it out."""
