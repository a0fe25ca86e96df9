// As main.c.
package main

import (
	"bytes"
	"fmt"
	"os"
	"time"
)

func main() {
	for _, each := range os.Args[1:] {
		fmt.Println("argument", each)
	}
	unit := os.Getenv("unit")
	if unit == "" {
		unit = "none"
	}
	fmt.Println("unit", unit)
	file, err := os.OpenFile("/data/kept", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err == nil {
		fmt.Fprintln(file, "line")
		file.Close()
		kept, _ := os.ReadFile("/data/kept")
		fmt.Println("lines", bytes.Count(kept, []byte("\n")))
	} else {
		fmt.Println("no file")
	}
	now := "past"
	if time.Now().Unix() > 1700000000 {
		now = "now"
	}
	fmt.Println("time", now)
	fmt.Fprintln(os.Stderr, "a warning")
	if os.Args[len(os.Args)-1] == "fail" {
		os.Exit(3)
	}
}
