//! One real control plane: started, stopped, started again on its data.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use aws_lc_rs::encoding::{AsDer, EcPrivateKeyRfc5915Der};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use base64::Engine;
use krake_model::resources::{parse_quantity, parse_quantity_millis};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Assets;
use crate::ports;
use crate::process::{self, LOOK, ProcessId, write_private};
use crate::progress::Progress;

/// A control plane on a busy machine is ready within this time or not at all.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// The API server has to answer a read within this; otherwise it is asked again.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// How long processes may take to end by themselves.
const STOP_PATIENCE: Duration = Duration::from_secs(8);
/// A kubelet's usual limit, so that many pods take several nodes.
const PODS_PER_NODE: u64 = 110;
/// More nodes than this show nothing more.
const NODES_MAX: u64 = 8;

/// Who plays the kubelet of each node.
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";

/// What the nodes of a cluster offer in all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// A quantity of cores.
    pub cpu: String,
    /// A quantity of bytes.
    pub memory: String,
    /// How many pods can run.
    pub pods: u64,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            cpu: "16".to_owned(),
            memory: "64Gi".to_owned(),
            pods: 440,
        }
    }
}

/// Where the servers listen, at 127.0.0.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// etcd for clients.
    pub etcd: u16,
    /// etcd for its peers (there are none).
    pub etcd_peer: u16,
    /// The API server.
    pub api: u16,
    /// The controller manager's health.
    pub controller_manager: u16,
    /// The scheduler's health.
    pub scheduler: u16,
}

impl Ports {
    fn all(self) -> [u16; 5] {
        [
            self.etcd,
            self.etcd_peer,
            self.api,
            self.controller_manager,
            self.scheduler,
        ]
    }
}

/// A running control plane. Dropping it kills what was started, unless [`RealCluster::detach`] was
/// called; its data stays, and [`RealCluster::start`] on the same directory goes on with it.
#[derive(Debug)]
pub struct RealCluster {
    /// For kubectl and drivers: cluster administrator by token.
    pub kubeconfig: PathBuf,
    /// The processes: etcd, API server, controller manager, scheduler, kwok.
    pub pids: Vec<u32>,
    /// The API server's address.
    pub server: String,
    processes: Vec<(String, ProcessId)>,
    assets: Assets,
    directory: PathBuf,
    ends_with_us: bool,
}

impl RealCluster {
    /// Starts a cluster in `dir`, or the one that was there again, and waits until its nodes are
    /// ready. The programs are found or built first ([`super::assets`]).
    ///
    /// # Errors
    /// When the programs cannot be had, a port of a restarted cluster is taken, or a process
    /// ends or does not become ready; the text has the end of its log.
    pub async fn start(dir: &Path, name: &str, capacity: &Capacity) -> anyhow::Result<Self> {
        let assets = super::assets(&Progress::default()).await?;
        Self::start_with(&assets, dir, name, capacity, |_| Ok(())).await
    }

    /// As [`RealCluster::start`], with programs found before. `note` learns of every process as
    /// soon as it runs, so that somebody else can end it if this program cannot.
    ///
    /// # Errors
    /// As there, and those of `note`.
    pub async fn start_with(
        assets: &Assets,
        dir: &Path,
        name: &str,
        capacity: &Capacity,
        note: impl Fn(&[(String, ProcessId)]) -> anyhow::Result<()> + Send + Sync,
    ) -> anyhow::Result<Self> {
        let (mut cluster, ports) = Self::prepared(assets, dir, name)?;
        let logs = cluster.logs();
        in_time(name, &logs, cluster.bring_up(name, ports, capacity, &note)).await?;
        Ok(cluster)
    }

    /// Starts only etcd and the API server in `dir`: objects are kept, and nothing acts on them.
    ///
    /// # Errors
    /// As [`RealCluster::start`].
    pub async fn start_api_server(dir: &Path, name: &str) -> anyhow::Result<Self> {
        let assets = super::assets(&Progress::default()).await?;
        let (mut cluster, ports) = Self::prepared(&assets, dir, name)?;
        let logs = cluster.logs();
        in_time(name, &logs, cluster.bring_up_api(ports, &|_| Ok(()))).await?;
        Ok(cluster)
    }

    fn prepared(assets: &Assets, dir: &Path, name: &str) -> anyhow::Result<(Self, Ports)> {
        let dir = std::path::absolute(dir)?;
        let ports = prepare(&dir, name)?;
        let cluster = Self {
            kubeconfig: dir.join("kubeconfig"),
            pids: Vec::new(),
            server: format!("https://127.0.0.1:{}", ports.api),
            processes: Vec::new(),
            assets: assets.clone(),
            directory: dir,
            ends_with_us: true,
        };
        Ok((cluster, ports))
    }

    /// Starts etcd and the API server, and waits until it serves.
    async fn bring_up_api(
        &mut self,
        ports: Ports,
        note: &(impl Fn(&[(String, ProcessId)]) -> anyhow::Result<()> + Sync),
    ) -> anyhow::Result<Client> {
        let assets = self.assets.clone();
        self.spawn("etcd", &assets.etcd, etcd_arguments(&self.directory, ports))?;
        self.spawn(
            "kube-apiserver",
            &assets.kube_apiserver,
            api_server_arguments(&self.directory, ports),
        )?;
        note(&self.processes)?;
        // The API server makes its certificate, to which the kubeconfig points, when it starts.
        let certificate = self.directory.join("certificates/apiserver.crt");
        self.until(|| certificate.exists()).await?;
        // A client reads the certificate once, and the file is there a moment before what is in
        // it: a client made then trusts nobody for ever.
        loop {
            self.check_alive()?;
            if let Ok(client) = client(&self.kubeconfig).await
                && get(&client, "/readyz").await.is_ok()
            {
                return Ok(client);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn bring_up(
        &mut self,
        name: &str,
        ports: Ports,
        capacity: &Capacity,
        note: &(impl Fn(&[(String, ProcessId)]) -> anyhow::Result<()> + Sync),
    ) -> anyhow::Result<()> {
        let assets = self.assets.clone();
        let client = self.bring_up_api(ports, note).await?;
        let manager = controller_manager_arguments(&self.directory, &self.kubeconfig, ports);
        self.spawn(
            "kube-controller-manager",
            &assets.kube_controller_manager,
            manager,
        )?;
        let scheduler = vec![
            format!("--kubeconfig={}", self.kubeconfig.display()),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", ports.scheduler),
        ];
        self.spawn("kube-scheduler", &assets.kube_scheduler, scheduler)?;
        drop_leases(&client).await?;
        self.spawn_kwok()?;
        note(&self.processes)?;
        let nodes = nodes(name, capacity)?;
        for node in &nodes {
            create(&client, "/api/v1/nodes", node).await?;
        }
        self.wait_until_usable(&client, nodes.len()).await
    }

    /// Ready: every node is and belongs to this kwok, and pods can be made (which takes the
    /// default service account).
    async fn wait_until_usable(&self, client: &Client, node_count: usize) -> anyhow::Result<()> {
        loop {
            self.check_alive()?;
            let account = "/api/v1/namespaces/default/serviceaccounts/default";
            if let Ok(list) = get_json(client, "/api/v1/nodes").await
                && ready_nodes(&list) >= node_count
                && let Ok(leases) = get_json(client, LEASES).await
                && leases["items"].as_array().map_or(0, Vec::len) >= node_count
                && get(client, account).await.is_ok()
            {
                return Ok(());
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    fn spawn_kwok(&mut self) -> anyhow::Result<()> {
        let arguments = vec![
            format!("--kubeconfig={}", self.kubeconfig.display()),
            "--manage-all-nodes=true".to_owned(),
            // Without it nodes become NotReady for a while every 55 s.
            "--node-lease-duration-seconds=40".to_owned(),
            "--v=WARN".to_owned(),
        ];
        let kwok = self.assets.kwok.clone();
        self.spawn("kwok", &kwok, arguments)
    }

    fn spawn(
        &mut self,
        component: &str,
        program: &Path,
        arguments: Vec<String>,
    ) -> anyhow::Result<()> {
        let log = self.logs().join(format!("{component}.log"));
        let home = self.directory.display().to_string();
        let process = process::spawn_detached(program, &arguments, &[("HOME", &home)], &log)?;
        self.processes.retain(|(name, _)| name != component);
        self.processes.push((component.to_owned(), process));
        self.pids = self.processes.iter().map(|(_, p)| p.pid).collect();
        Ok(())
    }

    fn logs(&self) -> PathBuf {
        self.directory.join("logs")
    }

    fn check_alive(&self) -> anyhow::Result<()> {
        for (component, process) in &self.processes {
            if !process.is_alive() {
                let log = self.logs().join(format!("{component}.log"));
                bail!(
                    "{component} ended; the end of {}:\n{}",
                    log.display(),
                    process::tail(&log, 8)
                );
            }
        }
        Ok(())
    }

    async fn until(&self, state: impl Fn() -> bool) -> anyhow::Result<()> {
        while !state() {
            self.check_alive()?;
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// The processes by name.
    pub fn processes(&self) -> &[(String, ProcessId)] {
        &self.processes
    }

    /// The process ids.
    fn ids(&self) -> Vec<ProcessId> {
        self.processes.iter().map(|(_, process)| *process).collect()
    }

    /// Lets the processes go on after this value is dropped.
    pub fn detach(mut self) -> Vec<(String, ProcessId)> {
        self.ends_with_us = false;
        std::mem::take(&mut self.processes)
    }

    /// Ends all processes, gracefully at first; the data stays.
    pub async fn stop(mut self) {
        let ids = self.ids();
        self.processes.clear();
        process::terminate(&ids, STOP_PATIENCE).await;
    }

    /// Kills all processes at once, as a power cut would; the data stays.
    pub async fn kill(mut self) {
        let ids = self.ids();
        self.processes.clear();
        process::kill_now(&ids).await;
    }

    /// Stops all processes in time (SIGSTOP): the cluster is there and does not answer.
    pub fn pause(&self) {
        for process in self.ids() {
            process.signal(Signal::SIGSTOP);
        }
    }

    /// Lets all go on. kwok is started anew: after a long silence of the API server it would never
    /// turn a pod ready again, which a kubelet does.
    ///
    /// # Errors
    /// When the API server does not answer, or kwok cannot be started.
    pub async fn resume(&mut self) -> anyhow::Result<()> {
        for process in self.ids() {
            process.signal(Signal::SIGCONT);
        }
        if let Some((_, kwok)) = self.processes.iter().find(|(name, _)| name == "kwok") {
            process::kill_now(&[*kwok]).await;
        }
        drop_leases(&client(&self.kubeconfig).await?).await?;
        self.spawn_kwok()
    }

    /// A running cluster that another process started.
    pub fn adopt(
        assets: &Assets,
        dir: &Path,
        processes: Vec<(String, ProcessId)>,
    ) -> anyhow::Result<Self> {
        let directory = std::path::absolute(dir)?;
        let ports = read_ports(&directory)?.context("the cluster was never started")?;
        Ok(Self {
            kubeconfig: directory.join("kubeconfig"),
            pids: processes.iter().map(|(_, process)| process.pid).collect(),
            server: format!("https://127.0.0.1:{}", ports.api),
            processes,
            assets: assets.clone(),
            directory,
            ends_with_us: false,
        })
    }
}

impl Drop for RealCluster {
    fn drop(&mut self) {
        if self.ends_with_us {
            process::kill_blocking(&self.ids());
        }
    }
}

/// Waits for `starting`, but not for ever.
async fn in_time<T>(
    name: &str,
    logs: &Path,
    starting: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    match tokio::time::timeout(READY_WITHIN, starting).await {
        Ok(result) => result,
        Err(_) => bail!(
            "Kubernetes of {name} was not ready after {} s; its logs are in {}",
            READY_WITHIN.as_secs(),
            logs.display()
        ),
    }
}

fn read_ports(dir: &Path) -> anyhow::Result<Option<Ports>> {
    let path = dir.join("ports.json");
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .with_context(|| format!("{} is damaged", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Ports, keys, token and kubeconfig: made at the first start, and checked at the later ones.
fn prepare(dir: &Path, name: &str) -> anyhow::Result<Ports> {
    for part in ["certificates", "logs"] {
        let path = dir.join(part);
        std::fs::create_dir_all(&path)
            .with_context(|| format!("cannot create {}", path.display()))?;
    }
    if let Some(ports) = read_ports(dir)? {
        for port in ports.all() {
            if !ports::is_free(port) {
                bail!(
                    "port {port} of Kubernetes of {name} is in use by another program: end it (ss -ltnp 'sport = :{port}' names it), or start the cluster anew in another directory"
                );
            }
        }
        return Ok(ports);
    }
    let key = service_account_key()?;
    write_private(&dir.join("service-account.key"), key.as_bytes())?;
    let token = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(rand::random::<[u8; 24]>());
    let line = format!("{token},admin,admin,system:masters\n");
    write_private(&dir.join("tokens.csv"), line.as_bytes())?;
    let taken = ports::allocate(dir, 5)?;
    let ports = Ports {
        etcd: taken[0],
        etcd_peer: taken[1],
        api: taken[2],
        controller_manager: taken[3],
        scheduler: taken[4],
    };
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {
            "server": format!("https://127.0.0.1:{}", ports.api),
            "certificate-authority": dir.join("certificates/apiserver.crt"),
        }}],
        "users": [{"name": "admin", "user": {"token": token}}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": "admin"}}],
        "current-context": name,
    });
    let text = serde_saphyr::to_string(&kubeconfig)?;
    write_private(&dir.join("kubeconfig"), text.as_bytes())?;
    // Last: a directory without it is prepared again.
    write_private(&dir.join("ports.json"), &serde_json::to_vec(&ports)?)?;
    Ok(ports)
}

/// A fresh key in the form the API server reads (SEC 1, PEM).
fn service_account_key() -> anyhow::Result<String> {
    let failed = |_| anyhow::anyhow!("cannot make a key for service accounts");
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).map_err(failed)?;
    let der: EcPrivateKeyRfc5915Der<'_> = pair.private_key().as_der().map_err(failed)?;
    let text = base64::engine::general_purpose::STANDARD.encode(der.as_ref());
    let mut pem = String::from("-----BEGIN EC PRIVATE KEY-----\n");
    for line in text.as_bytes().chunks(64) {
        pem.push_str(&String::from_utf8_lossy(line));
        pem.push('\n');
    }
    pem.push_str("-----END EC PRIVATE KEY-----\n");
    Ok(pem)
}

fn etcd_arguments(dir: &Path, ports: Ports) -> Vec<String> {
    let client = format!("http://127.0.0.1:{}", ports.etcd);
    let peer = format!("http://127.0.0.1:{}", ports.etcd_peer);
    vec![
        format!("--data-dir={}", dir.join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // Killing a process loses nothing that it wrote; only a crash of the machine would.
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
    ]
}

fn api_server_arguments(dir: &Path, ports: Ports) -> Vec<String> {
    let key = dir.join("service-account.key").display().to_string();
    vec![
        format!("--etcd-servers=http://127.0.0.1:{}", ports.etcd),
        format!("--cert-dir={}", dir.join("certificates").display()),
        "--bind-address=127.0.0.1".to_owned(),
        "--advertise-address=127.0.0.1".to_owned(),
        format!("--secure-port={}", ports.api),
        "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
        "--authorization-mode=RBAC".to_owned(),
        format!("--token-auth-file={}", dir.join("tokens.csv").display()),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--service-account-key-file={key}"),
        format!("--service-account-signing-key-file={key}"),
        "--endpoint-reconciler-type=none".to_owned(),
    ]
}

fn controller_manager_arguments(dir: &Path, kubeconfig: &Path, ports: Ports) -> Vec<String> {
    vec![
        format!("--kubeconfig={}", kubeconfig.display()),
        format!(
            "--service-account-private-key-file={}",
            dir.join("service-account.key").display()
        ),
        // With its defaults, 20 and 30, twenty Deployments that come at once wait four seconds for
        // their pods.
        "--kube-api-qps=200".to_owned(),
        "--kube-api-burst=400".to_owned(),
        "--leader-elect=false".to_owned(),
        "--bind-address=127.0.0.1".to_owned(),
        format!("--secure-port={}", ports.controller_manager),
    ]
}

/// The Node objects; kwok plays their kubelets.
fn nodes(name: &str, capacity: &Capacity) -> anyhow::Result<Vec<Value>> {
    let cpu = parse_quantity_millis(&capacity.cpu)?;
    let memory = parse_quantity(&capacity.memory)?;
    let count = (capacity.pods / PODS_PER_NODE).clamp(1, NODES_MAX);
    // The first one gets what cannot be divided.
    let share = |whole: u64, index: u64| whole / count + if index == 0 { whole % count } else { 0 };
    Ok((0..count)
        .map(|index| {
            let node = format!("{name}-{}", index + 1);
            let resources = json!({
                "cpu": format!("{}m", share(cpu, index)),
                "memory": share(memory, index).to_string(),
                "pods": share(capacity.pods, index).to_string(),
            });
            json!({
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": node, "labels": {
                    "kubernetes.io/hostname": node,
                    "kubernetes.io/os": "linux",
                    "kubernetes.io/arch": "amd64",
                }},
                "status": {"capacity": resources, "allocatable": resources},
            })
        })
        .collect())
}

fn ready_nodes(list: &Value) -> usize {
    let is_ready = |node: &Value| {
        node.pointer("/status/conditions")
            .and_then(Value::as_array)
            .is_some_and(|conditions| {
                conditions
                    .iter()
                    .any(|c| c["type"] == "Ready" && c["status"] == "True")
            })
    };
    list["items"].as_array().map_or(0, |items| {
        items.iter().filter(|node| is_ready(node)).count()
    })
}

async fn client(kubeconfig: &Path) -> anyhow::Result<Client> {
    let file = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

async fn get(client: &Client, path: &str) -> anyhow::Result<String> {
    let request = http::Request::get(path).body(Vec::new())?;
    let answer = tokio::time::timeout(ANSWER_WITHIN, client.request_text(request)).await;
    Ok(answer.context("no answer in time")??)
}

async fn get_json(client: &Client, path: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&get(client, path).await?)?)
}

/// A new kwok would leave the nodes alone until the lease of the one before has run out.
async fn drop_leases(client: &Client) -> anyhow::Result<()> {
    let request = http::Request::delete(LEASES).body(Vec::new())?;
    client
        .request_text(request)
        .await
        .context("cannot take the nodes over from an earlier kwok")?;
    Ok(())
}

/// Creates an object; one that is there already is left as it is.
async fn create(client: &Client, path: &str, object: &Value) -> anyhow::Result<()> {
    let request = http::Request::post(path)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(serde_json::to_vec(object)?)?;
    match client.request::<Value>(request).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot create {}", object["kind"])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Why the client is made anew until the API server answers.
    #[tokio::test]
    async fn a_certificate_that_is_not_written_yet_makes_a_client() {
        let scratch = tempfile::tempdir().unwrap();
        let kubeconfig = scratch.path().join("kubeconfig");
        std::fs::write(scratch.path().join("apiserver.crt"), "").unwrap();
        let text = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1",
                "certificate-authority": "apiserver.crt"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
            "users": [{"name": "c", "user": {}}]});
        std::fs::write(&kubeconfig, text.to_string()).unwrap();
        assert!(client(&kubeconfig).await.is_ok());
    }

    #[test]
    fn nodes_add_up_to_the_capacity() {
        let capacity = Capacity {
            cpu: "17".to_owned(),
            memory: "3Gi".to_owned(),
            pods: 331,
        };
        let nodes = nodes("oslo", &capacity).unwrap();
        assert_eq!(nodes.len(), 3);
        let sum = |name: &str, parse: &dyn Fn(&str) -> u64| -> u64 {
            let value = |node: &Value| parse(node["status"]["capacity"][name].as_str().unwrap());
            nodes.iter().map(value).sum()
        };
        let plain = |text: &str| parse_quantity(text).unwrap();
        assert_eq!(
            sum("cpu", &|text| parse_quantity_millis(text).unwrap()),
            17_000
        );
        assert_eq!(sum("memory", &plain), 3 << 30);
        assert_eq!(sum("pods", &plain), 331);
    }

    #[test]
    fn a_cluster_is_prepared_once_and_its_secrets_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let ports = prepare(dir.path(), "oslo").unwrap();
        let before = std::fs::read(dir.path().join("kubeconfig")).unwrap();
        assert_eq!(prepare(dir.path(), "oslo").unwrap(), ports);
        assert_eq!(
            std::fs::read(dir.path().join("kubeconfig")).unwrap(),
            before
        );
        for name in ["kubeconfig", "tokens.csv", "service-account.key"] {
            let mode = dir
                .path()
                .join(name)
                .metadata()
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let taken = std::net::TcpListener::bind(("127.0.0.1", ports.api)).unwrap();
        let error = prepare(dir.path(), "oslo").unwrap_err().to_string();
        assert!(error.contains(&format!("port {} ", ports.api)), "{error}");
        drop(taken);
    }
}
