// Command chartdoc writes the table of a chart's values into a page: from the
// comments and defaults of values.yaml, and the types of values.schema.json. A
// value without a comment, or that the schema does not know, is an error.
//
// Usage: chartdoc CHART PAGE. In the page, what stands between the lines
// "<!-- values -->" and "<!-- end of values -->" is replaced.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"go.yaml.in/yaml/v3"
)

const begin, end = "<!-- values -->\n", "<!-- end of values -->\n"

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: chartdoc CHART PAGE")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "chartdoc:", err)
		os.Exit(1)
	}
}

func run(chart, page string) error {
	text, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		return err
	}
	var values yaml.Node
	if err := yaml.Unmarshal(text, &values); err != nil {
		return err
	}
	var s schema
	if text, err = os.ReadFile(filepath.Join(chart, "values.schema.json")); err != nil {
		return err
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return err
	}
	var table strings.Builder
	table.WriteString("| value | default | |\n|---|---|---|\n")
	if err := rows(&table, "", values.Content[0], &s); err != nil {
		return err
	}
	old, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	head, rest, ok := strings.Cut(string(old), begin)
	_, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s lacks the lines %q and %q", page, strings.TrimSpace(begin), strings.TrimSpace(end))
	}
	return os.WriteFile(page, []byte(head+begin+table.String()+end+tail), 0o644)
}

// schema is what we read of a JSON schema.
type schema struct {
	Properties map[string]*schema `json:"properties"`
	Enum       []string           `json:"enum"`
}

// rows writes the rows of a mapping's values, each below the path that leads
// there.
func rows(w *strings.Builder, path string, mapping *yaml.Node, s *schema) error {
	for i := 0; i < len(mapping.Content); i += 2 {
		key, value := mapping.Content[i], mapping.Content[i+1]
		name := path + key.Value
		of := s.Properties[key.Value]
		if of == nil {
			return fmt.Errorf("%s is not in the schema", name)
		}
		comment := paragraph(key.HeadComment)
		// A mapping whose keys the schema lists is a group of values; one
		// without is a value itself.
		if value.Kind == yaml.MappingNode && len(of.Properties) > 0 && !isWhole[name] {
			if comment != "" {
				fmt.Fprintf(w, "| `%s` | | %s |\n", name, comment)
			}
			if err := rows(w, name+".", value, of); err != nil {
				return err
			}
			continue
		}
		if comment == "" {
			return fmt.Errorf("%s has no comment", name)
		}
		d, err := flow(value)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintf(w, "| `%s` | %s | %s |\n", name, d, comment)
	}
	return nil
}

// isWhole are the groups that are shown as one value: Kubernetes' own types.
var isWhole = map[string]bool{"updateStrategy": true, "resources": true}

// paragraph is a comment without its marks: the last paragraph, which is the
// one that belongs to the key below it.
func paragraph(comment string) string {
	parts := strings.Split(comment, "\n\n")
	var words []string
	for line := range strings.Lines(parts[len(parts)-1]) {
		words = append(words, strings.Fields(strings.TrimPrefix(strings.TrimSpace(line), "#"))...)
	}
	return strings.ReplaceAll(strings.Join(words, " "), "|", `\|`)
}

// flow is a default in one line, as code.
func flow(n *yaml.Node) (string, error) {
	if n.Kind == yaml.ScalarNode && (n.Value == "" || n.Tag == "!!null") {
		return "–", nil
	}
	c := *n
	if c.Kind != yaml.ScalarNode {
		if len(c.Content) == 0 {
			return "–", nil
		}
		// JSON is YAML in one line.
		var v any
		if err := n.Decode(&v); err != nil {
			return "", err
		}
		b, err := json.Marshal(v)
		if err != nil {
			return "", err
		}
		return "`" + string(b) + "`", nil
	}
	return "`" + c.Value + "`", nil
}
