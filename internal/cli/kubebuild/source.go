package kubebuild

// FindSource returns the repository that Ensure builds of: given, or the one
// that this program, or the working directory, is in.
func FindSource(given string) (string, error) { return findSource(given) }
