// Command peer is all that is in the containers of the tests:
//
//	peer serve           answers each connection to port 80 with the client's address
//	peer ask ADDR:PORT   prints what such a server answers
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

func main() {
	err := fmt.Errorf("usage: peer serve | peer ask ADDR:PORT")
	switch {
	case len(os.Args) == 2 && os.Args[1] == "serve":
		err = serve()
	case len(os.Args) == 3 && os.Args[1] == "ask":
		err = ask(os.Args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve() error {
	l, err := net.Listen("tcp4", ":80")
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		_, _ = io.WriteString(c, c.RemoteAddr().(*net.TCPAddr).IP.String())
		c.Close()
	}
}

func ask(server string) error {
	c, err := net.DialTimeout("tcp4", server, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return err
	}
	_, err = io.Copy(os.Stdout, c)
	return err
}
