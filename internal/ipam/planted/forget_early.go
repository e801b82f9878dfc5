//go:build planted_forget_early

package planted

// Bug is the fault that is planted.
const Bug = ForgetEarly
