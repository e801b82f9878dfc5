package pipe

import (
	"errors"
	"unicode/utf8"
)

var errJSON = errors.New("it is no JSON object")

// StringIn returns the string that a JSON object has under key, at its top
// level; "" when there is none. Of several the last counts. It looks only as
// close as it must to find the end of each value: what it takes for an object
// may still be none. An error: it is no object, or the value is no string.
func StringIn(object []byte, key string) (string, error) {
	s := scanner{b: object}
	if s.next() != '{' {
		return "", errJSON
	}
	s.i++
	found := ""
	for first := true; ; first = false {
		if s.next() == '}' && first {
			return found, nil
		}
		k, ok := s.text()
		if !ok || s.next() != ':' {
			return "", errJSON
		}
		s.i++
		if k == key && s.next() == '"' {
			if found, ok = s.text(); !ok {
				return "", errJSON
			}
		} else if k == key {
			return "", errors.New("\"" + key + "\" is no string")
		} else if !s.skip() {
			return "", errJSON
		}
		switch s.next() {
		case ',':
			s.i++
		case '}':
			return found, nil
		default:
			return "", errJSON
		}
	}
}

type scanner struct {
	b []byte
	i int
}

// next skips white space and returns the byte that follows, 0 at the end.
func (s *scanner) next() byte {
	for ; s.i < len(s.b); s.i++ {
		switch c := s.b[s.i]; c {
		case ' ', '\t', '\r', '\n':
		default:
			return c
		}
	}
	return 0
}

// skip passes over one value.
func (s *scanner) skip() bool {
	depth := 0
	for {
		switch c := s.next(); c {
		case 0:
			return false
		case '"':
			if !s.pass() {
				return false
			}
		case '{', '[':
			depth++
			s.i++
		case '}', ']':
			if depth == 0 {
				return false
			}
			depth--
			s.i++
		case ',', ':':
			if depth == 0 {
				return false
			}
			s.i++
			continue
		default: // a number or a word
			for s.i < len(s.b) && !delimiter(s.b[s.i]) {
				s.i++
			}
		}
		if depth == 0 {
			return true
		}
	}
}

func delimiter(c byte) bool {
	switch c {
	case ' ', '\t', '\r', '\n', ',', ':', '{', '}', '[', ']', '"':
		return true
	}
	return false
}

// pass passes over a string, whose opening quote is next.
func (s *scanner) pass() bool {
	for s.i++; s.i < len(s.b); s.i++ {
		switch s.b[s.i] {
		case '\\':
			s.i++
		case '"':
			s.i++
			return true
		}
	}
	return false
}

// text reads a string. A surrogate in \u is read as the replacement character:
// the path of a socket has none.
func (s *scanner) text() (string, bool) {
	if s.next() != '"' {
		return "", false
	}
	start := s.i + 1
	if !s.pass() {
		return "", false
	}
	raw := s.b[start : s.i-1]
	out := make([]byte, 0, len(raw))
	for i := 0; i < len(raw); i++ {
		if raw[i] != '\\' {
			out = append(out, raw[i])
			continue
		}
		i++
		switch raw[i] { // pass has seen a byte after each backslash
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case '"', '\\', '/':
			out = append(out, raw[i])
		case 'u':
			r, ok := hex4(raw[i+1:])
			if !ok {
				return "", false
			}
			out = utf8.AppendRune(out, r)
			i += 4
		default:
			return "", false
		}
	}
	return string(out), true
}

func hex4(b []byte) (r rune, ok bool) {
	if len(b) < 4 {
		return 0, false
	}
	for _, c := range b[:4] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// AppendQuoted appends s as a JSON string. Bytes that are no UTF-8 become the
// replacement character.
func AppendQuoted(b []byte, s string) []byte {
	const hex = "0123456789abcdef"
	b = append(b, '"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b = append(b, '\\', byte(r))
		case r < ' ':
			b = append(b, '\\', 'u', '0', '0', hex[r>>4], hex[r&15])
		default:
			b = utf8.AppendRune(b, r)
		}
	}
	return append(b, '"')
}
