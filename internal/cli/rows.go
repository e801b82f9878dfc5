package cli

import (
	"fmt"
	"io"
	"strings"
)

// rowPrinter prints a table that never ends, row by row: columns grow with what
// comes. It begins with its head.
type rowPrinter struct {
	head   []string
	widths []int // of the columns, runes
	headed bool
}

func (p *rowPrinter) print(w io.Writer, cells []cell) error {
	color := colored(w)
	line := func(cells []cell) string {
		var b strings.Builder
		for i, c := range cells {
			if i >= len(p.widths) {
				p.widths = append(p.widths, 0)
			}
			n := len([]rune(c.text))
			p.widths[i] = max(p.widths[i], n)
			pad := strings.Repeat(" ", p.widths[i]-n)
			text := paint(c.text, c.tone, color)
			if c.right {
				b.WriteString(pad + text + "  ")
			} else {
				b.WriteString(text + pad + "  ")
			}
		}
		return strings.TrimRight(b.String(), " ")
	}
	body := line(cells)
	if !p.headed {
		p.headed = true
		head := make([]cell, len(p.head))
		for i, h := range p.head {
			head[i] = cell{text: h, tone: dim, right: i < len(cells) && cells[i].right}
		}
		if _, err := fmt.Fprintln(w, line(head)); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintln(w, body)
	return err
}
