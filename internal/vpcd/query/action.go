package query

// Version is the one version of the EC2 API that there is.
const Version = "2016-11-15"

// Action is what the model says of one API action.
type Action struct {
	Name     string
	NoOutput bool // the answer is <return>true</return>

	// Bounds of the parameter MaxResults; 0: none is published.
	MinResults, MaxResults int64

	// Filters are the names that Filter.N.Name may have. "tag" stands for
	// tag:KEY with any KEY. nil: the action's filters are not published, or
	// it has none.
	Filters []string

	newRequest, newResponse func() any
}
