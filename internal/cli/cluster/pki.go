package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"
)

// certLife is how long the certificates of a lab are good for. A lab that is
// older is made anew.
const certLife = 365 * 24 * time.Hour

// authority signs the certificates of one cluster.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	now  time.Time
}

// pair is a certificate and its key, both in PEM.
type pair struct{ cert, key []byte }

// subject says whom a certificate is for. Kubernetes reads the user from the
// common name and the groups from the organizations.
type subject struct {
	user   string
	groups []string
	names  []string     // of a server
	ips    []netip.Addr // of a server
}

func newAuthority(name string, now time.Time) (*authority, pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, pair{}, fmt.Errorf("make the key of the certificate authority: %w", err)
	}
	t := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Minute), NotAfter: now.Add(certLife),
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		IsCA:     true, BasicConstraintsValid: true,
	}
	a := &authority{cert: t, key: key, now: now}
	p, err := a.sign(t, key)
	if err != nil {
		return nil, pair{}, err
	}
	block, _ := pem.Decode(p.cert)
	if a.cert, err = x509.ParseCertificate(block.Bytes); err != nil {
		return nil, pair{}, fmt.Errorf("read our own certificate: %w", err)
	}
	return a, p, nil
}

// issue makes a key and a certificate for s, as a client, and as a server when
// s has names or addresses.
func (a *authority) issue(s subject) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, fmt.Errorf("make a key for %s: %w", s.user, err)
	}
	t := &x509.Certificate{
		Subject:   pkix.Name{CommonName: s.user, Organization: s.groups},
		NotBefore: a.now.Add(-time.Minute), NotAfter: a.now.Add(certLife),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		DNSNames:    s.names,
	}
	for _, ip := range s.ips {
		t.IPAddresses = append(t.IPAddresses, net.IP(ip.AsSlice()))
	}
	if len(t.DNSNames)+len(t.IPAddresses) > 0 {
		t.ExtKeyUsage = append(t.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	return a.sign(t, key)
}

func (a *authority) sign(t *x509.Certificate, key *ecdsa.PrivateKey) (pair, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return pair{}, fmt.Errorf("choose a serial number: %w", err)
	}
	t.SerialNumber = serial
	der, err := x509.CreateCertificate(rand.Reader, t, a.cert, &key.PublicKey, a.key)
	if err != nil {
		return pair{}, fmt.Errorf("sign the certificate of %s: %w", t.Subject.CommonName, err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return pair{}, fmt.Errorf("encode the key of %s: %w", t.Subject.CommonName, err)
	}
	return pair{
		cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k}),
	}, nil
}

// kubeconfig is the part of a kubeconfig file that a lab's have. JSON is YAML.
type kubeconfig struct {
	APIVersion     string         `json:"apiVersion"`
	Kind           string         `json:"kind"`
	Clusters       []namedCluster `json:"clusters"`
	Users          []namedUser    `json:"users"`
	Contexts       []namedContext `json:"contexts"`
	CurrentContext string         `json:"current-context"`
}

type namedCluster struct {
	Name    string `json:"name"`
	Cluster struct {
		Server string `json:"server"`
		CA     []byte `json:"certificate-authority-data"`
	} `json:"cluster"`
}

type namedUser struct {
	Name string `json:"name"`
	User struct {
		Cert []byte `json:"client-certificate-data"`
		Key  []byte `json:"client-key-data"`
	} `json:"user"`
}

type namedContext struct {
	Name    string `json:"name"`
	Context struct {
		Cluster string `json:"cluster"`
		User    string `json:"user"`
	} `json:"context"`
}

func newKubeconfig(lab, user, server string, ca []byte, p pair) kubeconfig {
	k := kubeconfig{
		APIVersion: "v1", Kind: "Config", CurrentContext: lab,
		Clusters: []namedCluster{{Name: lab}}, Users: []namedUser{{Name: user}}, Contexts: []namedContext{{Name: lab}},
	}
	k.Clusters[0].Cluster.Server, k.Clusters[0].Cluster.CA = server, ca
	k.Users[0].User.Cert, k.Users[0].User.Key = p.cert, p.key
	k.Contexts[0].Context.Cluster, k.Contexts[0].Context.User = lab, user
	return k
}

// files writes files below dir and remembers the first error, so that a list
// of writes reads as one.
type files struct {
	dir string
	err error
}

func (f *files) write(name string, b []byte, mode os.FileMode) {
	if f.err != nil {
		return
	}
	path := filepath.Join(f.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.err = fmt.Errorf("write %s: %w", path, err)
		return
	}
	if err := os.WriteFile(path, b, mode); err != nil {
		f.err = fmt.Errorf("write %s: %w", path, err)
	}
}

func (f *files) json(name string, v any, mode os.FileMode) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil && f.err == nil {
		f.err = fmt.Errorf("encode %s: %w", name, err)
	}
	f.write(name, append(b, '\n'), mode)
}

func (f *files) pair(name string, p pair) {
	f.write(name+".crt", p.cert, 0o644)
	f.write(name+".key", p.key, 0o600)
}
