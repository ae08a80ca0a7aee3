#include "graph_loop.h"
#include "launch.cuh"

namespace pyode::cuda {

#if PYODE_GRAPH_LOOPS

namespace {

constexpr int kFirstDriver = 12040;  // that has WHILE nodes

const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is told, and not to be found again
  return cudaGetErrorString(error);
}

cudaGraph_t graph_at(void* graph) { return static_cast<cudaGraph_t>(graph); }

cudaError_t add_while(cudaGraph_t graph, cudaGraphNode_t behind, unsigned long long condition, cudaGraph_t* body) {
  cudaGraphNodeParams loop = {};
  loop.type = cudaGraphNodeTypeConditional;
  loop.conditional.handle = condition;
  loop.conditional.type = cudaGraphCondTypeWhile;
  loop.conditional.size = 1;
  cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
  const cudaError_t error = cudaGraphAddNode(&node, graph, &behind, nullptr, 1, &loop);
#else
  const cudaError_t error = cudaGraphAddNode(&node, graph, &behind, 1, &loop);
#endif
  if (error == cudaSuccess) *body = loop.conditional.phGraph_out[0];
  return error;
}

}  // namespace

GraphLoop::~GraphLoop() {
  if (executable_ != nullptr) cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(executable_));
  if (graph_ != nullptr) cudaGraphDestroy(graph_at(graph_));
}

const char* GraphLoop::create() {
  int driver = 0;
  if (const char* error = text_of(cudaDriverGetVersion(&driver))) return error;
  if (driver < kFirstDriver) return "the driver is older than CUDA 12.4";
  cudaGraph_t graph;
  if (const char* error = text_of(cudaGraphCreate(&graph, 0))) return error;
  graph_ = graph;
  cudaGraphConditionalHandle condition;
  const cudaError_t error = cudaGraphConditionalHandleCreate(&condition, graph, 1, cudaGraphCondAssignDefault);
  condition_ = condition;
  return text_of(error);
}

const char* GraphLoop::assemble(void* opening, void* body) {
  cudaGraphNode_t first, repeated;
  cudaGraph_t inside;
  cudaGraphExec_t executable;
  cudaError_t error = cudaGraphAddChildGraphNode(&first, graph_at(graph_), nullptr, 0, graph_at(opening));
  if (error == cudaSuccess) error = add_while(graph_at(graph_), first, condition_, &inside);
  if (error == cudaSuccess) error = cudaGraphAddChildGraphNode(&repeated, inside, nullptr, 0, graph_at(body));
  if (error == cudaSuccess) error = cudaGraphInstantiate(&executable, graph_at(graph_));
  if (error == cudaSuccess) executable_ = executable;
  return text_of(error);
}

const char* GraphLoop::launch(void* stream) const {
  return text_of(cudaGraphLaunch(static_cast<cudaGraphExec_t>(executable_), static_cast<cudaStream_t>(stream)));
}

#else

GraphLoop::~GraphLoop() = default;
const char* GraphLoop::create() { return "pyode was built with a CUDA older than 12.4"; }
const char* GraphLoop::assemble(void*, void*) { return create(); }
const char* GraphLoop::launch(void*) const { return "pyode was built with a CUDA older than 12.4"; }

#endif

}  // namespace pyode::cuda
