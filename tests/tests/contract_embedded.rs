//! The driver's contract on the embedded Kubernetes.

use std::time::{Duration, Instant};

use krake_testnet::embedded::{self, Options};
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_driver_keeps_its_contract_on_embedded_kubernetes() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("contract");
    let stop = CancellationToken::new();
    let options = Options {
        dir: dir.clone(),
        listen: "127.0.0.1:0".parse().unwrap(),
        cpu: "16".to_owned(),
        memory: "64Gi".to_owned(),
        pods: 440,
    };
    let cluster = tokio::spawn(embedded::serve(options, stop.clone()));
    let kubeconfig = dir.join("kubeconfig");
    let started = Instant::now();
    while !kubeconfig.exists() {
        assert!(!cluster.is_finished(), "{:?}", cluster.await);
        assert!(
            started.elapsed() < Duration::from_secs(20),
            "it does not start"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    krake_tests::contract::run(&kubeconfig).await;
    stop.cancel();
    cluster.await.unwrap().unwrap();
}
