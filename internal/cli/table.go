package cli

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// tone is how a cell looks on a terminal.
type tone int

const (
	plain tone = iota
	dim
	good
	bad
	strong
)

var sgr = map[tone]string{dim: "2", good: "32", bad: "31", strong: "1"}

// cell is a text with its tone. A right cell is aligned to the right, as
// numbers are.
type cell struct {
	text  string
	tone  tone
	right bool
}

func text(s string) cell            { return cell{text: s} }
func textf(f string, v ...any) cell { return cell{text: fmt.Sprintf(f, v...)} }
func number(n int) cell             { return cell{text: fmt.Sprint(n), right: true} }

// table is rows of cells under a head. Columns are as wide as they must be,
// two spaces apart; a column whose cells are all empty is left out.
type table struct {
	head []string
	rows [][]cell
}

func (t *table) row(cells ...cell) { t.rows = append(t.rows, cells) }

// write prints the table, each line after indent.
func (t *table) write(w io.Writer, indent string, color bool) {
	width := make([]int, len(t.head))
	right := make([]bool, len(t.head))
	for _, r := range t.rows {
		for i, c := range r {
			if i >= len(width) {
				break
			}
			if n := utf8.RuneCountInString(c.text); n > 0 {
				width[i] = max(width[i], n, utf8.RuneCountInString(t.head[i]))
			}
			right[i] = right[i] || c.right
		}
	}
	line := func(cells []cell) {
		var b strings.Builder
		b.WriteString(indent)
		pending := 0 // spaces before the next cell that has text
		for i, c := range cells {
			if i >= len(width) || width[i] == 0 {
				continue
			}
			pad := width[i] - utf8.RuneCountInString(c.text)
			if right[i] {
				pending += pad
			}
			if c.text != "" {
				b.WriteString(strings.Repeat(" ", pending))
				pending = 0
				b.WriteString(paint(c.text, c.tone, color))
			}
			if !right[i] {
				pending += pad
			}
			pending += 2
		}
		fmt.Fprintln(w, strings.TrimRight(b.String(), " "))
	}
	head := make([]cell, len(t.head))
	for i, h := range t.head {
		head[i] = cell{text: h, tone: dim}
	}
	line(head)
	for _, r := range t.rows {
		line(r)
	}
}

func paint(s string, t tone, color bool) string {
	if !color || t == plain || s == "" {
		return s
	}
	return "\x1b[" + sgr[t] + "m" + s + "\x1b[0m"
}
