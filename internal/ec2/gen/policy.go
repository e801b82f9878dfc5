package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strings"
)

type policy struct {
	Version   string
	Statement []statement
}

type statement struct {
	Sid, Effect      string
	Action, Resource []string
}

// kinds are the resources that the node's calls are on: its interfaces, itself,
// and the subnet and the groups that it makes interfaces in.
var kinds = []string{"instance", "network-interface", "security-group", "subnet"}

// sources are the files of the client, in package ec2.
var sources = []string{"client.go", "group.go", "peering.go"}

// document makes the policy of the calls in the client's sources: the methods
// of its interface api, all of which it must call.
func document(sources ...string) ([]byte, error) {
	var files []*ast.File
	for _, source := range sources {
		f, err := parser.ParseFile(token.NewFileSet(), source, nil, 0)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	listed, called, tags := calls(files)
	if len(listed) == 0 {
		return nil, errors.New("there is no interface api, or it is empty")
	}
	var read, change []string
	for _, name := range listed {
		if !called[name] {
			return nil, fmt.Errorf("%s is in the interface api, and nothing calls it: take it out", name)
		}
		if strings.HasPrefix(name, "Describe") || strings.HasPrefix(name, "Get") {
			read = append(read, "ec2:"+name)
		} else {
			change = append(change, "ec2:"+name)
		}
	}
	arn := func(kind string) string { return "arn:aws:ec2:*:*:" + kind + "/*" }
	var on []string
	for _, k := range kinds {
		on = append(on, arn(k))
	}
	p := policy{Version: "2012-10-17", Statement: []statement{
		{"Read", "Allow", read, []string{"*"}}, // EC2 allows no other resource for these
		{"Interfaces", "Allow", change, on},
	}}
	if tags { // given at creation, which takes a permission of its own
		p.Statement = append(p.Statement, statement{"Tags", "Allow", []string{"ec2:CreateTags"}, []string{arn("network-interface")}})
	}
	b, err := json.MarshalIndent(p, "", "  ")
	return append(b, '\n'), err
}

// calls returns the methods of the interface api, in order, which of them
// something refers to, and whether requests carry tags.
func calls(files []*ast.File) (listed []string, called map[string]bool, tags bool) {
	called = map[string]bool{}
	look := func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.TypeSpec:
			if i, ok := n.Type.(*ast.InterfaceType); ok && n.Name.Name == "api" {
				for _, m := range i.Methods.List {
					listed = append(listed, m.Names[0].Name)
				}
			}
		case *ast.SelectorExpr: // c.api.AttachNetworkInterface
			if x, ok := n.X.(*ast.SelectorExpr); ok && x.Sel.Name == "api" {
				called[n.Sel.Name] = true
			}
		case *ast.KeyValueExpr:
			if k, ok := n.Key.(*ast.Ident); ok && k.Name == "TagSpecifications" {
				tags = true
			}
		}
		return true
	}
	for _, f := range files {
		ast.Inspect(f, look)
	}
	slices.Sort(listed)
	return listed, called, tags
}
