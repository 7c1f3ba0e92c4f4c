//! The driver's contract on a real API server with its controllers, scheduler and simulated
//! kubelets.

use krake_testnet::kube::{Capacity, RealCluster, wanted};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_driver_keeps_its_contract_on_real_kubernetes() {
    if !wanted().unwrap() {
        eprintln!("left out: the driver's contract on real Kubernetes (KRAKE_SKIP_REAL_KUBE=1)");
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let capacity = Capacity::default();
    let cluster = RealCluster::start(scratch.path(), "contract", &capacity)
        .await
        .unwrap();
    krake_tests::contract::run(&cluster.kubeconfig).await;
    cluster.stop().await;
}
