package cli

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

func (a *App) envCommand() *cobra.Command {
	var shell string
	var unset bool
	c := &cobra.Command{
		Use:   "env",
		Short: "Print what kubectl, the AWS CLI and SDKs need to speak to the lab",
		Long: `Prints variables for a shell, and a function aws that adds --endpoint-url: AWS CLI
before 2.13 (Debian 12 has 2.9) reads no endpoint from its environment. A profile
of its own keeps yours out of it. boto3 before 1.28 needs the endpoint by hand:
boto3.client("ec2", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).

In a lab with Kubernetes also KUBECONFIG, and a PATH with the kubectl and the helm that
belong to it.`,
		Example: `  eval "$(underlay env)"
  aws ec2 describe-network-interfaces
  kubectl get pods -A -o wide                 # a lab with Kubernetes
  eval "$(underlay env --unset)"
  underlay env --shell fish | source`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if shell != "sh" && shell != "fish" {
				return fmt.Errorf("--shell %s is not known; use sh (bash, zsh, dash) or fish", shell)
			}
			if unset {
				return a.print(map[string]string{}, func(w io.Writer) { writeUnset(w, a.home(), shell) })
			}
			h := a.home()
			f, err := h.loadUp()
			if err != nil {
				return err
			}
			vars := awsEnv(h, f)
			m := map[string]string{}
			for _, v := range vars {
				m[v.name] = v.value
			}
			return a.print(m, func(w io.Writer) { writeEnv(w, shell, f.Lab.Endpoint, vars) })
		},
	}
	c.Flags().StringVar(&shell, "shell", "sh", "for which shell: sh or fish")
	c.Flags().BoolVar(&unset, "unset", false, "print what undoes it")
	_ = c.RegisterFlagCompletionFunc("shell", cobra.FixedCompletions([]string{"sh", "fish"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

type variable struct{ name, value string }

func awsConfigFile(h home) string      { return filepath.Join(h.dir(), "aws", "config") }
func awsCredentialsFile(h home) string { return filepath.Join(h.dir(), "aws", "credentials") }

// writeAWSConfig writes the profile that awsEnv points to.
func writeAWSConfig(h home, f *labFile) error {
	if err := os.MkdirAll(filepath.Dir(awsConfigFile(h)), 0o755); err != nil {
		return fmt.Errorf("write the AWS profile: %w", err)
	}
	config := fmt.Sprintf("[default]\nregion = %s\noutput = json\ncli_pager =\nendpoint_url = %s\n", f.Region, f.Lab.Endpoint)
	if err := writeFile(awsConfigFile(h), []byte(config), 0o644); err != nil {
		return err
	}
	return writeFile(awsCredentialsFile(h), []byte("[default]\naws_access_key_id = AKIAUNDERLAYUSER0000\naws_secret_access_key = underlay\n"), 0o644)
}

// awsEnv is the environment of AWS clients. The keys are no secret: vpcd
// verifies none.
func awsEnv(h home, f *labFile) []variable {
	vars := []variable{
		{"AWS_ENDPOINT_URL", f.Lab.Endpoint},
		{"AWS_ENDPOINT_URL_EC2", f.Lab.Endpoint},
		{"AWS_REGION", f.Region},
		{"AWS_DEFAULT_REGION", f.Region},
		{"AWS_ACCESS_KEY_ID", "AKIAUNDERLAYUSER0000"},
		{"AWS_SECRET_ACCESS_KEY", "underlay"},
		{"AWS_CONFIG_FILE", awsConfigFile(h)},
		{"AWS_SHARED_CREDENTIALS_FILE", awsCredentialsFile(h)},
		{"AWS_EC2_METADATA_DISABLED", "true"},
		{"AWS_PAGER", ""},
	}
	if k := f.Lab.Kubernetes; k != nil {
		vars = append(vars, variable{"KUBECONFIG", k.Kubeconfig}, variable{kubernetesBin, k.Bin})
	}
	return vars
}

// kubernetesBin is the variable with the directory of kubectl that env has put
// in PATH.
const kubernetesBin = "UNDERLAY_KUBERNETES_BIN"

// inTheWay are variables that would lead an AWS client elsewhere.
var inTheWay = []string{"AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_SESSION_TOKEN"}

func writeEnv(w io.Writer, shell, endpoint string, vars []variable) {
	if shell == "fish" {
		for _, v := range inTheWay {
			fmt.Fprintf(w, "set -e %s;\n", v)
		}
		for _, v := range vars {
			fmt.Fprintf(w, "set -gx %s %s;\n", v.name, quote(v.value))
		}
		if hasKubernetes(vars) {
			fmt.Fprintf(w, "contains -- $%[1]s $PATH; or set -gx PATH $%[1]s $PATH;\n", kubernetesBin)
		}
		fmt.Fprintf(w, "function aws; command aws --endpoint-url %s $argv; end;\n", quote(endpoint))
		fmt.Fprintln(w, "# use it:  underlay env --shell fish | source")
		return
	}
	fmt.Fprintf(w, "unset %s\n", strings.Join(inTheWay, " "))
	for _, v := range vars {
		fmt.Fprintf(w, "export %s=%s\n", v.name, quote(v.value))
	}
	if hasKubernetes(vars) {
		fmt.Fprintf(w, "case \":$PATH:\" in *\":$%[1]s:\"*) ;; *) export PATH=\"$%[1]s:$PATH\" ;; esac\n", kubernetesBin)
	}
	fmt.Fprintf(w, "aws() { command aws --endpoint-url %s \"$@\"; }\n", quote(endpoint))
	fmt.Fprintln(w, `# use it:  eval "$(underlay env)"`)
}

func hasKubernetes(vars []variable) bool {
	return slices.ContainsFunc(vars, func(v variable) bool { return v.name == kubernetesBin })
}

// writeUnset undoes what writeEnv's output did, whether the lab is still there
// or not: a kubeconfig of the person's own, and its PATH, stay as they are.
func writeUnset(w io.Writer, h home, shell string) {
	var names []string
	for _, v := range awsEnv(home{}, &labFile{}) {
		names = append(names, v.name)
	}
	if shell == "fish" {
		fmt.Fprintf(w, "set -e %s;\nfunctions -e aws;\n", strings.Join(names, " "))
		fmt.Fprintf(w, "string match -q -- %s \"$KUBECONFIG\"; and set -e KUBECONFIG;\n", quote(h.dir()+"/*"))
		fmt.Fprintf(w, "set -q %[1]s; and set -gx PATH (string match -v -- $%[1]s $PATH); and set -e %[1]s;\n", kubernetesBin)
		return
	}
	fmt.Fprintf(w, "unset %s\nunset -f aws\n", strings.Join(names, " "))
	fmt.Fprintf(w, "case \"$KUBECONFIG\" in %s/*) unset KUBECONFIG ;; esac\n", quote(h.dir()))
	fmt.Fprintf(w, "PATH=${PATH#\"${%[1]s:-/}:\"}; unset %[1]s\n", kubernetesBin)
}

// quote quotes s for a shell.
func quote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
