// Package iam judges calls by IAM policies: documents of the one kind that a
// user or role carries (identity-based).
//
//	Parse     a document, whole or not at all
//	Policy    Judge(action, resource): allowed, denied, or not mentioned
//	Guard     which policy is for whom; its Gate stands before the EC2 handlers
//
// # What is honoured
//
// Version 2012-10-17; Statement with Sid, Effect, Action and Resource, the last
// two with * and ?. An explicit Deny wins over any Allow, and what nothing
// allows is denied. All else that a document may hold (Condition, NotAction,
// NotResource, Principal, policy variables) is refused when it is read: a policy
// that means something else here than on AWS would be worse than none.
//
// A Policy is immutable, a Guard too: both are safe for concurrent use.
package iam
